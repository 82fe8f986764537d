"""S3: a client, one bucket and prefix as a store, folders that exist when their manifest does."""

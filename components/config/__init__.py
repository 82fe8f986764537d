"""The config: one schema, how it is read and written, and the tables that it is checked against."""

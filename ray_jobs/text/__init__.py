"""Text for a base: a conversation in its chat template, batches of tokens, and the loss on their answers."""

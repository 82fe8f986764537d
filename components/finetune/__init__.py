"""Fine-tune an adapter: the step that submits the training job to Ray."""

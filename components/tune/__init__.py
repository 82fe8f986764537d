"""Find the learning rate to train at: the step that submits the sweep to Ray, where one is due."""

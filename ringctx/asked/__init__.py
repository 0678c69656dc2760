"""What a configuration asks of attention, as values that the layers below know; inference and training read it alike."""

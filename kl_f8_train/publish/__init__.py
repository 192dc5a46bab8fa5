"""How does it leave? Export, model card, injection into full checkpoints."""

"""How is a decoder finetuned? Networks, losses, the step, and what the machine gives it."""

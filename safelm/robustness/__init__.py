"""Attacks on our own small models beyond the paper's: given first words, a hidden or unlearned tag, more finetuning."""

"""Attacks on our own small models beyond the paper's: prefilled answers, a hidden or unlearned tag, finetuning."""

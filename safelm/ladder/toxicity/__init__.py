"""The ladder on real text that is toxic in part, measured by continuations of RealToxicityPrompts."""

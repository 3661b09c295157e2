"""The data in SeqIO: sources, preprocessors, vocabulary, tasks, mixtures and the rates of the ladder."""

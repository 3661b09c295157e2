"""Token stores to and from other programs' files: Megatron's, datatrove's, and tables of the library `datasets`."""

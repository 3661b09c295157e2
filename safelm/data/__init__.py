"""How the data are fed: token stores, the mixture's exact schedule, order, packing, batches, the Grain loader."""

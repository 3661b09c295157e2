"""Work over many files: shards, settings that an output folder guards, Apache Beam."""

"""Work over many files: shards, output folders that refuse changed settings, Apache Beam."""

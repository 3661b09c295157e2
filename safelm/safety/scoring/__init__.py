"""Scoring files of documents: input shards to scored rows by folder, resumable, on any Beam runner."""

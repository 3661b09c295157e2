"""Offline text to text: scoring documents for harm and reporting on corpora. Knows no trainer."""

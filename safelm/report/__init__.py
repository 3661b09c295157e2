"""Building blocks of reports: tables (terminal, Markdown, JSON, HTML), charts in one style, self-contained pages."""

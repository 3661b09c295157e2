"""What every report is made of: tables (print, Markdown, JSON, page), charts of one style, self-contained pages."""

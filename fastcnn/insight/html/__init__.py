"""Pages as HTML: documents, tables, charts."""

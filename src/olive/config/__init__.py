"""The workflow document: typed models, older spellings, loader, JSON Schema, messages."""

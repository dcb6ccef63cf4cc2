"""Opt-ins for other libraries, one module each: nothing here is imported, or needed, by fi_ops itself."""

"""Reports that people look at: self-contained HTML pages (standard library and numpy only)."""

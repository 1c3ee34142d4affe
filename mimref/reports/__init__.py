"""What users see: tables, figures, progress."""

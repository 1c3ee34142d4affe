"""Output for users: tables, figures, reports and progress."""

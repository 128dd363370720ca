"""Edit sessions: the exact original comes back, or the edit stays."""

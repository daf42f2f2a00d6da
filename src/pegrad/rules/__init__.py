"""What each kind of operation contributes to a per-example gradient: one family a file or folder."""

"""What the collection is held against: other ways to make one answer of several experts."""

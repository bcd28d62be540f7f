"""Number formats, and what keeps numbers sound: loss scale, non-finite values, batch norm."""

"""From a prompt's ids to new tokens and their trace."""

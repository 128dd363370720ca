"""What can be declared for a parameter, as values: constraints, and what differs between its rows."""

"""What to do to each weight: the parts, the published systems as named values, and the checks of both."""

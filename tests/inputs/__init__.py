"""Pictures and films of every kind that may come with a request, made by the tests themselves."""

"""SGLang's DiffGenerator as an engine: the library runs in a process of its own, and never in the server's."""

"""Drawing for others over HTTP: the engine, what paints with it, the interface, the page. `pipelines.serve` puts it on Ray."""

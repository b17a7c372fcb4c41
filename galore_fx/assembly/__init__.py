"""From a request to a model that trains: decisions, reparametrised and quantised weights, optimizer, forwards."""

"""One folder a site: keys, certificates and the processes that use them."""

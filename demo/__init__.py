"""`make demo`: the case Pointsman exists for, played in network namespaces of this machine."""

"""Many devices and hosts: features spread over a mesh, networks run piece by piece."""

"""fscached: container images whose files arrive when somebody reads them, served by the kernel."""

__version__ = "0.1.0"

"""Runs in a cluster: rendered from the manifests in ``k8s/``, applied by kubectl, followed, stopped and deleted."""

"""Attribution: AtP, AtP*, integrated gradients at nodes, path patching, and their exact verification."""

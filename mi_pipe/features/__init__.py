"""What each feature of an SAE is: how often it fires, how strongly, on what text, and which tokens it promotes."""

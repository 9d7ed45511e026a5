"""What attention heads do, by description and by intervention, and how far both agree."""

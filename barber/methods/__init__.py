"""The methods: what goes, what is exchanged, what kept weights become; nothing here knows a model."""

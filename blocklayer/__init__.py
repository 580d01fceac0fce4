"""blocklayer: the block layer of a virtual-machine monitor as an asyncio library."""

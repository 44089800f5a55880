"""Real processes under supervision: pods, and servers such as the embedded Kafka."""

curl http://localhost:8000/v1/models \
-H "Authorization: Bearer sk-hypergen-123456"

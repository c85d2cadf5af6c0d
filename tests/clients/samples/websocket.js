const ws = new WebSocket('ws://localhost:8080/ws');

ws.onopen = () => {
  ws.send(JSON.stringify({
    type: 'subscribe',
    channels: ['gpu_updates', 'billing_events']
  }));
};

ws.onmessage = (event) => {
  const data = JSON.parse(event.data);
  console.log('Event:', data.type, data.payload);

  switch(data.type) {
    case 'gpu_available':
      // Handle new GPU availability
      break;
    case 'payment_completed':
      // Handle payment completion
      break;
  }
};

# Ruby: TCPSocket. HOST PORT PATH COUNT
require "socket"

host, port, path, count = ARGV
Integer(count).times do
  socket = TCPSocket.new(host, Integer(port))
  peer = socket.remote_address.ip_address
  socket.write("GET #{path} HTTP/1.1\r\nHost: #{host}\r\nConnection: close\r\n\r\n")
  head, body = socket.read.split("\r\n\r\n", 2)
  puts "#{head[/^X-Pod: (\S+)/, 1]} #{peer} #{body}"
  socket.close
end

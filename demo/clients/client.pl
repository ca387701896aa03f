# Perl: IO::Socket::INET. HOST PORT PATH COUNT
use strict;
use warnings;
use IO::Socket::INET;

my ($host, $port, $path, $count) = @ARGV;
for (1 .. $count) {
    my $socket = IO::Socket::INET->new(PeerHost => $host, PeerPort => $port) or die "$host: $@";
    my $peer = $socket->peerhost;
    print $socket "GET $path HTTP/1.1\r\nHost: $host\r\nConnection: close\r\n\r\n";
    my $answer = do { local $/; <$socket> };
    my ($head, $body) = split /\r\n\r\n/, $answer, 2;
    my ($pod) = $head =~ /^X-Pod: (\S+)/m;
    print "$pod $peer $body\n";
}

// Java: HttpURLConnection, which does not tell the peer. HOST PORT PATH COUNT
import java.net.HttpURLConnection;
import java.net.URI;

public class Client {
    public static void main(String[] args) throws Exception {
        var url = new URI("http://" + args[0] + ":" + args[1] + args[2]).toURL();
        for (int i = 0; i < Integer.parseInt(args[3]); i++) {
            var connection = (HttpURLConnection) url.openConnection();
            try (var body = connection.getInputStream()) {
                var text = new String(body.readAllBytes());
                System.out.println(connection.getHeaderField("X-Pod") + " - " + text);
            }
        }
    }
}

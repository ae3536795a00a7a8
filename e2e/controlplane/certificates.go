package main

import (
	"fmt"
	"net"
	"os"
	"path/filepath"

	"k8s.io/client-go/util/cert"
	"k8s.io/client-go/util/keyutil"
)

// certificates writes what an API server on address needs into a directory: server.crt (its own certificate,
// then the authority's, so that it serves as CA bundle too), server.key and service-account.key.
func certificates(directory, address string) error {
	server, serverKey, err := cert.GenerateSelfSignedCertKey(
		address, []net.IP{net.IPv4(127, 0, 0, 1)}, []string{"localhost", "kubernetes.default.svc"})
	if err != nil {
		return err
	}
	accountKey, err := keyutil.MakeEllipticPrivateKeyPEM()
	if err != nil {
		return err
	}
	for name, content := range map[string][]byte{
		"server.crt": server, "server.key": serverKey, "service-account.key": accountKey,
	} {
		if err := os.WriteFile(filepath.Join(directory, name), content, 0o600); err != nil {
			return fmt.Errorf("certificates: %w", err)
		}
	}
	return nil
}

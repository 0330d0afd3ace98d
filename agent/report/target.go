// SPDX-License-Identifier: Apache-2.0

package report

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
)

// target is a gateway's address taken apart.
type target struct {
	address string // as gRPC wants it
	host    string // name in its certificate; empty for a socket
	cfg     Config
}

func parseTarget(cfg Config) (target, error) {
	bad := func(why string) (target, error) {
		return target{}, fmt.Errorf("usage gateway %q: %s: want unix:///path or tcp://host:port", cfg.Target, why)
	}
	scheme, rest, ok := strings.Cut(cfg.Target, "://")
	if !ok {
		return bad("no scheme")
	}
	switch scheme {
	case "unix":
		if !filepath.IsAbs(rest) {
			return bad("the path is not absolute")
		}
		if cfg.CAFile != "" || cfg.CertFile != "" || cfg.KeyFile != "" {
			return bad("certificates are for tcp")
		}
		return target{address: "unix://" + rest, cfg: cfg}, nil
	case "tcp":
		host, port, err := net.SplitHostPort(rest)
		if err != nil || host == "" || port == "" {
			return bad("no host and port")
		}
		if (cfg.CertFile == "") != (cfg.KeyFile == "") {
			return target{}, errors.New("usage gateway: a certificate file and a key file go together")
		}
		return target{address: "passthrough:///" + rest, host: host, cfg: cfg}, nil
	}
	return bad("unknown scheme")
}

// credentials reads the certificate files.
func (t target) credentials() (credentials.TransportCredentials, error) {
	if t.host == "" {
		return insecure.NewCredentials(), nil
	}
	c := &tls.Config{MinVersion: tls.VersionTLS13, ServerName: t.host}
	if t.cfg.CAFile != "" {
		pem, err := os.ReadFile(t.cfg.CAFile)
		if err != nil {
			return nil, fmt.Errorf("read gateway CA: %w", err)
		}
		c.RootCAs = x509.NewCertPool()
		if !c.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("read gateway CA: no certificate in %s", t.cfg.CAFile)
		}
	}
	if t.cfg.CertFile != "" {
		cert, err := tls.LoadX509KeyPair(t.cfg.CertFile, t.cfg.KeyFile)
		if err != nil {
			return nil, fmt.Errorf("read node certificate: %w", err)
		}
		c.Certificates = []tls.Certificate{cert}
	}
	return credentials.NewTLS(c), nil
}

// connect makes a client. The connection itself is made by the first call.
func (t target) connect() (*grpc.ClientConn, error) {
	creds, err := t.credentials()
	if err != nil {
		return nil, err
	}
	conn, err := grpc.NewClient(t.address,
		grpc.WithTransportCredentials(creds),
		grpc.WithDisableServiceConfig(),
		grpc.WithNoProxy(),
	)
	if err != nil {
		return nil, fmt.Errorf("usage gateway %q: %w", t.cfg.Target, err)
	}
	return conn, nil
}
